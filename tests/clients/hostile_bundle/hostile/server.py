"""The hostile coordinator's half: it sends the orders to every node and keeps what comes back."""

import json
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    with open(context.run_config["orders"], encoding="utf-8") as file:
        orders = file.read()
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    content = {node: RecordDict({"orders": ConfigRecord({"json": orders})}) for node in nodes}
    ids = set(grid.push_messages([Message(content[node], node, "query") for node in nodes]))
    told, deadline = [], time.monotonic() + 40
    while ids and time.monotonic() < deadline:
        for reply in grid.pull_messages(ids):
            ids.discard(reply.metadata.reply_to_message_id)
            if reply.has_error():
                told.append({"code": reply.error.code, "reason": reply.error.reason})
            else:
                told.append(json.loads(reply.content["done"]["json"]))
        time.sleep(0.2)
    with open(context.run_config["result"], "w", encoding="utf-8") as file:
        json.dump(told, file)

"""A ClientApp that does what it is told by a hostile coordinator: asks the agent for anything, reads files,
signals, connects, floods. It speaks the socket's protocol itself and uses none of our modules.
"""

import base64
import json
import os
import signal
import socket
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    orders = json.loads(message.content["orders"]["json"])
    done = {}
    for name, order in orders.items():
        try:
            done[name] = globals()["do_" + order["do"]](order)
        except Exception as error:  # noqa: BLE001 - what failed is what the test looks at
            done[name] = {"error": type(error).__name__, "text": str(error)[:200]}
    return Message(RecordDict({"done": ConfigRecord({"json": json.dumps(done)})}), reply_to=message)


def do_ask(order):
    header = base64.b64decode(order["header"])
    blobs = {name: base64.b64decode(data) for name, data in order.get("blobs", {}).items()}
    return {"answer": ask(order["socket"], order["kind"], header, blobs)}


def do_read(order):
    with open(order["path"], "rb") as file:
        return {"read": len(file.read())}


def do_list(order):
    return {"names": os.listdir(order["path"])}


def do_write(order):
    with open(order["path"], "ab") as file:
        file.write(b"x")
    return {"written": 1}


def do_kill(order):
    os.kill(order["pid"], signal.SIGTERM if order.get("really") else 0)
    return {"signalled": order["pid"]}


def do_connect(order):
    with socket.create_connection((order["host"], order["port"]), timeout=2):
        return {"connected": True}


def do_environment(order):
    with open("/proc/self/environ", "rb") as file:
        kept = file.read()
    return {"names": sorted(os.environ), "initial": kept.decode(errors="replace")}


def do_flood(order):
    """Send many requests at once, and only then read what came back."""
    began, codes, held = time.monotonic(), {}, []
    for number in range(order["count"]):
        connection = socket.socket(socket.AF_UNIX)
        held.append(connection)
        try:
            connection.connect(order["socket"])
            connection.settimeout(30)
            head = {"kind": f"flood.{number}", "header": 2, "blobs": {}}
            connection.sendall(json.dumps(head).encode() + b"\n{}")
        except OSError:
            pass  # turned away before it was read: the answer says why
    for connection in held:
        try:
            code = json.loads(received(connection)["header"]).get("error", "none")
        except (OSError, ValueError) as error:
            code = type(error).__name__
        codes[code] = codes.get(code, 0) + 1
        connection.close()
    return {"codes": codes, "seconds": time.monotonic() - began}


def do_dawdle(order):
    """Begin many requests and never finish them."""
    held = []
    for _ in range(order["count"]):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(2)
        connection.connect(order["socket"])
        connection.sendall(b'{"kind":"hello"')
        held.append(connection)
    return {"held": len(held)}


def ask(path, kind, header, blobs):
    head = {"kind": kind, "header": len(header), "blobs": {name: len(data) for name, data in blobs.items()}}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(path)
        connection.sendall(json.dumps(head).encode() + b"\n" + header + b"".join(blobs.values()))
        return received(connection)


def received(connection):
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    first, _, rest = data.partition(b"\n")
    told = json.loads(first)
    return {"header": rest[: told["header"]].decode(), "blobs": list(told["blobs"])}

"""The access rules as package data: `access.cedarschema` says what exists, `access.cedar` who may do what."""

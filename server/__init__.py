"""Speaks HTTP: parse, authorise, call, render. No rules live here, except who may ask for what
(`policies/`).
"""

"""Speculative decoding with a real target and a draft, to count what is really accepted. Needs torch and transformers.

This measures; it is no engine. It stands beside `produce` and `consume` and may use both.
"""

"""The daemon that keeps one image classifier warm and answers over a Unix socket.

Importing this package, or any module of the front, loads no torch, numpy or pillow; those belong
to the worker process.
"""

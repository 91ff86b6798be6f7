"""Answers for applications on the same device, over HTTP on a unix socket or the loopback.

address.py   where: a path or 127.0.0.1:PORT
listener.py  in the agent's link process: holds the socket, starts the answering process at the first request
__main__.py  the answering process: gone after a rest, so that a device at rest pays for neither model nor runtime
server.py    HTTP, standard library only, bounded in bodies, connections and time
body.py      samples out of a request's body
newest.py    the newest personal model of a state folder, and what it answers
"""

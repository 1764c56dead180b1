"""Many machines, by Ray Serve: engine replicas behind one page and one API. The only room that imports ray.

replica.py is an engine in a process of its own, remote.py stands in for it where page and API are, app.py puts both together.
"""

"""Many engines behind one server: Ray Serve keeps the replicas, the server stays what it is.

reranker.py     RemoteReranker: the `submit` of a Reranker, answered by replicas; all that the server sees
replica.py      EngineReplica: a Reranker in a process of its own, and its deployment
routing.py      the replica with the fewest tokens to work off gets the next request
application.py  replicas and HTTP ingress as one Serve application, for `serve deploy` and Kubernetes
"""

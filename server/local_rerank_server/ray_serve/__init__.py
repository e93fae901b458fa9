"""Several engines behind one server, run as Ray Serve replicas.

reranker.py     RemoteReranker: `Reranker.submit` answered by replicas; the server sees only this
replica.py      EngineReplica: a Reranker in its own process, and the Ray Serve deployment
routing.py      sends each request to the replica with the fewest outstanding tokens
application.py  replicas and HTTP ingress as one Ray Serve application, for `serve deploy` and Kubernetes
"""

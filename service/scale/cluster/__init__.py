"""solo-serve on Ray: `solo-serve ray`, or `serve run service.scale.cluster.app:build_app`.

    client -> Front: the HTTP application -> Worker: decoding, engine, masks -> Front -> client

The front is the application of the single server, so the HTTP contract is the same; its segmenter
has a worker do what a request asks for, and asks another one if that worker is lost. An image
crosses the network encoded, once, and its answer comes back as the bytes that are sent.

Only `app` and `command` import Ray.
"""

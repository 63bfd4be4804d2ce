"""Runs one of Swift's servers, or writes the rings by which the servers find each other; for the environment with Swift.

python launch.py KIND-server CONFIG SWIFT_CONF
python launch.py rings FOLDER account=PORT container=PORT object=PORT
"""

import sys
import threading


class DictCache:
    """Replaces memcached, which a single proxy process does not need."""

    def __init__(self):
        self._values = {}
        self._lock = threading.Lock()

    def get(self, key, default=None, **_):
        return self._values.get(key, default)

    def set(self, key, value, **_):
        self._values[key] = value

    def delete(self, key, **_):
        self._values.pop(key, None)

    def incr(self, key, delta=1, **_):
        with self._lock:
            self._values[key] = int(self._values.get(key, 0)) + delta
            return self._values[key]

    def decr(self, key, delta=1, **_):
        return self.incr(key, -delta)

    def get_multi(self, keys, *_, **__):
        return [self._values.get(key) for key in keys]

    def set_multi(self, values, *_, **__):
        self._values.update(values)


def cache_filter(global_conf, **_):
    """A paste filter that gives the pipeline the cache."""
    cache = DictCache()

    def factory(app):
        def with_cache(environ, start_response):
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return with_cache

    return factory


def make_rings(folder, *ports):
    """Write the rings; each has one device, d1 of the server on loopback at this port."""
    from swift.common.ring import RingBuilder

    for kind, port in (text.split("=") for text in ports):
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
        address = {"ip": "127.0.0.1", "port": int(port), "replication_ip": "127.0.0.1", "replication_port": int(port)}
        builder.add_dev({"region": 1, "zone": 1, "device": "d1", "weight": 1.0, "meta": "", **address})
        builder.rebalance()
        builder.get_ring().save(f"{folder}/{kind}.ring.gz")


def serve(kind, config, swift_conf):
    import swift.common.storage_policy
    import swift.common.utils
    import swift.common.wsgi

    for name, module in list(sys.modules.items()):
        if name.startswith("swift.") and hasattr(module, "SWIFT_CONF_FILE"):
            module.SWIFT_CONF_FILE = swift_conf
    sys.exit(swift.common.wsgi.run_wsgi(config, kind))


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    make_rings(*given) if what == "rings" else serve(what, *given)

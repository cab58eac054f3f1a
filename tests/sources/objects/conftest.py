"""What the tests of stores share. Without ``obstore`` there are none."""

import pytest
from web import Proxy, Web, served


def pytest_collection_modifyitems(items):
    try:
        import obstore  # noqa: F401
    except ModuleNotFoundError:
        for item in items:
            if "/sources/objects/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs obstore: pip install 'hotweights[cloud]'"))


@pytest.fixture
def serve():
    """Serves a folder; gives the proxy before the server, whose address is ``proxy.url + "/m"``."""
    running = []

    def start(folder, **options):
        web = Web(served(folder), **options)
        running.append(web)
        proxy = Proxy(web.url)
        running.append(proxy)
        proxy.web = web
        return proxy

    yield start
    for server in reversed(running):
        server.__exit__()

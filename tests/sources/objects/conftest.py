"""What the tests of stores share. Without ``obstore`` there are none."""

import pytest
from clouds import Azure
from web import Proxy, Web, served


def pytest_collection_modifyitems(items):
    try:
        import obstore  # noqa: F401
    except ModuleNotFoundError:
        for item in items:
            if "/sources/objects/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="needs obstore: pip install 'hotweights[cloud]'"))


OF_HUBS = """HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_CACHE
HUGGINGFACE_HUB_CACHE HF_HUB_DISABLE_IMPLICIT_TOKEN HF_ENDPOINT""".split()


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """Nothing says which hub is asked, or by whom; tests of other folders have set that there is no network."""
    for name in OF_HUBS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


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


@pytest.fixture
def bucket(monkeypatch):
    """A container of Azure that the variables lead to, behind a proxy."""
    with Azure() as server, Proxy(server.url) as proxy:
        variables = {"STORAGE_ACCOUNT_NAME": "account", "ENDPOINT": f"{proxy.url}/account", "SKIP_SIGNATURE": "true"}
        for name, value in {**variables, "ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(f"AZURE_{name}", value)
        proxy.server = server
        yield proxy

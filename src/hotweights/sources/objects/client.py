"""Client: the store of the package ``obstore`` that an address and its options lead to, and how long it waits."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

from ...errors import MissingPackage, UsageError

_ENDPOINTS = ("endpoint", "endpoint_url", "base_url")  # how the options end that name a server
_RETRIES = 100  # of the package itself, where it writes: until the deadline
_VARIABLES = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}
_USUAL_TIMEOUT = 30.0  # seconds that the package gives a request by itself
OF_CLIENT = """
allow_http allow_invalid_certificates connect_timeout default_headers http1_only http2_only pool_idle_timeout
pool_max_idle_per_host proxy_url timeout read_timeout http2_keep_alive_interval http2_keep_alive_timeout
http2_keep_alive_while_idle default_content_type randomize_addresses
proxy_ca_certificate proxy_excludes root_certificate user_agent
""".split()
"""Options that the package keeps apart from those of a store."""


def package_store(url: str, shown: str, options: dict[str, object], deadline: float, writes: bool) -> Any:
    """The package's store at ``url``, which messages call ``shown``. Nothing is asked yet.

    Args:
        url: scheme and bucket, container or host.
        shown: the same without credentials.
        options: those of the store and of its client.
        deadline: seconds that its user has for a request, all tries together.
        writes: whether the package tries again itself, until the deadline.

    Raises:
        MissingPackage: it is not installed.
        UsageError: an option is unknown, or the store cannot be used.
    """
    try:
        import obstore  # noqa: F401  # First: where it is not, the error names it.
        from obstore.store import HTTPStore, from_url
    except ModuleNotFoundError as error:
        if error.name != "obstore":
            raise
        raise MissingPackage("obstore", "cloud") from error
    scheme = url.partition(":")[0]
    given = {name: options.pop(name) for name in OF_CLIENT if name in options}
    endpoints = [str(value) for name, value in options.items() if name.lower().endswith(_ENDPOINTS)]
    limits: dict[str, Any] = {"retry_config": {"max_retries": 0}}  # ``Store`` tries again, and counts.
    timeout = max(_USUAL_TIMEOUT, deadline)  # ``Store`` sees when nothing comes.
    if writes:
        # They end before the deadline: the last answer says more than that none came in time.
        pause = {"init_backoff": timedelta(seconds=0.05), "max_backoff": timedelta(seconds=max(0.1, deadline / 10))}
        until = timedelta(seconds=0.7 * deadline)
        limits = {"retry_config": {"max_retries": _RETRIES, "retry_timeout": until, "backoff": {**pause, "base": 2}}}
        timeout = 0.45 * deadline  # for a part that is written, so that there is a second try
    client: dict[str, object] = {"timeout": timedelta(seconds=timeout), **_of_variables(scheme)}
    if scheme == "http" or any(value.startswith("http://") for value in endpoints):
        client["allow_http"] = True  # It is written out.
    limits["client_options"] = client | given
    problem = ""
    try:
        if scheme.startswith("http"):
            if options:
                raise UsageError(f"{shown}: store= has options that the web does not know: {', '.join(options)}")
            return HTTPStore(url, **limits)
        return from_url(url, config=options, **limits)
    except UsageError:
        raise
    except Exception as error:  # Its text may quote a secret.
        unknown = re.search(r"'(\w+)' is not", str(error)) if "Unknown" in type(error).__name__ else None
        problem = f"there is no option {unknown[1]!r}" if unknown else f"{type(error).__name__} by obstore"
        if "Account must be specified" in str(error):
            problem = 'its account is not known: set AZURE_STORAGE_ACCOUNT_NAME, or store={"account_name": name}'
    has = f"; store= has {', '.join(sorted([*options, *given]))}" if options or given else ""
    raise UsageError(f"{shown}: this store cannot be used: {problem}{has}")


def _of_variables(scheme: str) -> dict[str, str]:
    """What variables such as ``AWS_ALLOW_HTTP`` say of the client. The package forgets them when it is given any."""
    if scheme not in _VARIABLES:
        return {}
    said = {name.lower(): value for name, value in os.environ.items()}
    names = {name: f"{_VARIABLES[scheme]}_{name}".lower() for name in OF_CLIENT if name != "default_headers"}
    return {name: said[variable] for name, variable in names.items() if variable in said}

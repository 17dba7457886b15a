"""The server's address, and the proxy that the environment names for it."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import ssl
import urllib.request

import httpx

_DEFAULT_PORTS = {"http": 80, "https": 443}
_SOCKS = ("socks5", "socks5h")


def parse_address(text: str) -> httpx.URL:
    """The URL of a server.

    Raises:
        TypeError, ValueError: It is not one; the text names it.
    """
    shown = hide_password(str(text))
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"{shown!r} is not an address: {error}") from None
    if url.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"a server's address starts with http:// or https://, not {shown!r}")
    if url.query or url.fragment:
        raise ValueError(f"a server's address has no query and no fragment: {shown!r}")
    if reason := _find_fault(url):
        raise ValueError(f"{shown!r} is not an address: {reason}")
    return url


def find_proxy(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy for a server, from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

    The names may also be in lower case. On Windows and macOS the system's settings apply too.

    Raises:
        ValueError: The proxy cannot be used; the text names the variable.
    """
    proxies = urllib.request.getproxies()
    scheme = next((name for name in (url.scheme, "all") if proxies.get(name)), None)
    if scheme is None or is_excluded(url, proxies.get("no", "")):
        return None
    if urllib.request.proxy_bypass(url.host):  # the system's exceptions
        return None
    value = proxies[scheme]
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name) == value), f"{scheme} proxy")
    try:
        return _parse_proxy(value if "://" in value else f"http://{value}")
    except (httpx.InvalidURL, ValueError) as error:
        raise ValueError(f"{variable}={hide_password(value)}: {error}") from None


def _parse_proxy(text: str) -> httpx.Proxy:
    scheme = text.partition("://")[0].lower()
    if scheme not in (*_DEFAULT_PORTS, *_SOCKS):
        raise ValueError("a proxy's address starts with http://, https://, socks5:// or socks5h://")
    if scheme in _SOCKS and importlib.util.find_spec("socksio") is None:
        raise ValueError(
            "a SOCKS proxy needs pip install 'httpx[socks]'; NO_PROXY excludes a host from it"
        )
    proxy = httpx.Proxy(text)
    if reason := _find_fault(proxy.url):
        raise ValueError(reason)
    return proxy


def _find_fault(url: httpx.URL) -> str:
    """Why no connection to the host and port of a URL is possible, else ""."""
    if not url.host:
        return "it has no host"
    if url.port is not None and not 0 < url.port < 2**16:
        return f"its port is {url.port}"
    try:
        url.host.encode("idna")
    except UnicodeError as error:
        return f"its host is invalid: {error}"
    return ""


def load_certificates(url: httpx.URL, proxy: httpx.Proxy | None) -> ssl.SSLContext:
    """The certificates to trust; none if nothing is encrypted, as loading them takes a while.

    Raises:
        ValueError: SSL_CERT_FILE or SSL_CERT_DIR has none.
    """
    if "https" not in (url.scheme, proxy and proxy.url.scheme):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        given = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise ValueError(f"certificates cannot be loaded ({given}): {error}") from error


def hide_password(address: str) -> str:
    """The address without its user name and password."""
    return re.sub(r"^([a-z0-9+.-]+://)?.*@", r"\1***@", address, flags=re.IGNORECASE | re.DOTALL)


def is_excluded(url: httpx.URL, no_proxy: str) -> bool:
    """Whether an entry of NO_PROXY applies to the URL.

    An entry is a host, a domain (with its subdomains), an IP address, a network such as fd00::/8,
    or "*"; a port and a scheme restrict it. Host names are not resolved.
    """
    return any(_applies(entry, url) for entry in re.split(r"[\s,]+", no_proxy.lower()) if entry)


def _applies(entry: str, url: httpx.URL) -> bool:
    scheme, _, host = entry.rpartition("://")
    if scheme not in ("", "all", url.scheme):
        return False
    network = _parse_network(host)
    if network is None:
        host, colon, port = host.rstrip("/").rpartition(":")
        if not colon:
            host = port
        elif port != str(url.port or _DEFAULT_PORTS[url.scheme]):
            return False
        network = _parse_network(host)
    if network is not None:
        address = _parse_network(url.host)
        return address is not None and address.network_address in network
    return host == "*" or f".{url.host.rstrip('.')}".endswith(f".{host.strip('.').lstrip('*.')}")


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """An address is a network with one member; the brackets of IPv6 may be missing."""
    try:
        return ipaddress.ip_network(re.sub(r"^\[(.*)\](/\d+)?$", r"\1\2", text), strict=False)
    except ValueError:
        return None

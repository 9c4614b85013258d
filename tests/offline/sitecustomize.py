"Put this folder on PYTHONPATH and no Python process reaches past this machine: every socket but loopback is refused."
import ipaddress
import sys


def _is_local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", "0.0.0.0", "::"): return True
    try: return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError: return False


def _guard(event: str, args: tuple):
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None   # a unix socket's address is a path
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"): host = args[0]
    else: return
    if not _is_local(host): raise OSError(f"the tests run offline: no connection to {host!r}")


sys.addaudithook(_guard)

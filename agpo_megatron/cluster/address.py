"""Finds the address under which the other nodes reach this one. Never guessed: no fallback to localhost."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import psutil

from agpo_megatron.cluster.roles import LaunchError


def own_address(host: str, others: Sequence[str], interface: str = "") -> str:
    """Find the IPv4 address of this node, called ``host``, for the nodes ``others``.

    ``interface`` (site.env: AGPO_INTERFACE) decides where it is given. Otherwise it is the address the name resolves
    to; where that is a loopback address, as Debian's installer writes into /etc/hosts, the one that packets to the
    others leave from. Raises LaunchError when there is none.
    """
    if interface:
        return interface_address(interface)
    named = resolve(host)
    if not is_loopback(named) or not others:
        return named
    peers = {other: resolve(other) for other in others}
    for peer in peers.values():
        if not is_loopback(peer):
            return source_towards(peer)
    if len({named, *peers.values()}) == 1 + len(peers):
        return named  # one machine plays all nodes, each with a loopback address of its own
    raise LaunchError(
        f"{host} resolves to {named}, and so do other nodes: nobody could reach anybody; correct /etc/hosts, "
        "or name the network interface as AGPO_INTERFACE in launch/site.env"
    )


def resolve(host: str) -> str:
    """Look up the IPv4 address of ``host``. Raises LaunchError when this node does not know it."""
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise LaunchError(
            f"{socket.gethostname()} cannot resolve {host} ({error}); every node's name must resolve on every node"
        ) from error
    return str(address)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def source_towards(address: str) -> str:
    """Find this node's own address on the route to ``address``; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def interface_address(interface: str) -> str:
    """Find the first IPv4 address of a network interface. Raises LaunchError when it has none."""
    found = psutil.net_if_addrs()
    for entry in found.get(interface, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise LaunchError(
        f"{socket.gethostname()} has no IPv4 address on interface {interface} (AGPO_INTERFACE); "
        f"it has {', '.join(sorted(found))}"
    )


def interface_of(address: str) -> str:
    """Find the interface that ``address`` belongs to, for GLOO_SOCKET_IFNAME. Raises LaunchError."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family != socket.AF_INET:
                continue
            if entry.address == address or (is_loopback(address) and is_loopback(entry.address)):
                return name
    raise LaunchError(f"{socket.gethostname()} has no interface with address {address}")

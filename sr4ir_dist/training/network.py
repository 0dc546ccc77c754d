"""The network between ranks: which interface they talk through."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def settle_interface() -> None:
    """Let gloo and NCCL use the interface by which this node is known to Ray, unless one is set.

    Gloo would take the address of the host's own name, which is a loopback address in Debian's
    `/etc/hosts`: ranks on two nodes could not reach one another.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(_GLOO, interface)
        os.environ.setdefault(_NCCL, interface)


def interface_of(address: str) -> str | None:
    """The network interface that has an address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            # Scoped addresses of IPv6 name their interface after a percent sign.
            same = each.family in (socket.AF_INET, socket.AF_INET6)
            if same and each.address.partition("%")[0] == address:
                return name
    return None


_Backend: Any = TorchConfig().backend_cls


class _SettledBackend(_Backend):
    """Ray's own, on an interface that every node can be reached by."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(settle_interface)
        super().on_start(worker_group, backend_config)


class SettledTorchConfig(TorchConfig):
    """Ray's settings of torch's process group, which settle the interface first."""

    @property
    def backend_cls(self) -> Any:
        """The backend that Ray starts on the workers."""
        return _SettledBackend

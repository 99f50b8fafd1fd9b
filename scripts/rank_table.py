"""Read an Ascend rank table for the launcher: python scripts/rank_table.py FILE

Prints the number of nodes, the number of this node (NODE_RANK; 0 for a single node), the address of node 0 (MASTER_ADDR
or that of the table) and the device ids of this node. An unusable table gives one line `error: ...` and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class TableError(ValueError):
    """An unusable rank table; the text is one line for the user."""


def read_servers(path: Path) -> list[dict[str, Any]]:
    """Return the servers of a table with the device ids of each under `ids`.

    Raises:
        TableError: the servers have different numbers of devices, or ranks do not count from 0 through all servers.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TableError(f"{path}: not JSON ({error})") from None
    servers = table.get("server_list") if isinstance(table, dict) else None
    if not isinstance(servers, list) or not servers:
        raise TableError(f"{path}: has no server_list; write a rank table with hccl_tools.py")
    if str(table.get("server_count", len(servers))) != str(len(servers)):
        raise TableError(f"{path}: server_count is {table['server_count']}, but server_list has {len(servers)}")
    ranks: list[int] = []
    for number, server in enumerate(servers):
        try:
            ranks += [int(device["rank_id"]) for device in server["device"]]
            server["ids"] = [int(device["device_id"]) for device in server["device"]]
            server["server_id"] = str(server["server_id"])
        except (KeyError, TypeError, ValueError):
            raise TableError(
                f"{path}: server {number} needs server_id and a list device whose entries have device_id and rank_id"
            ) from None
        if len(server["ids"]) != len(servers[0]["ids"]) or not server["ids"]:
            raise TableError(
                f"{path}: server {number} has {len(server['ids'])} devices, server 0 {len(servers[0]['ids'])}; "
                "each needs the same number above 0"
            )
    if ranks != list(range(len(ranks))):
        raise TableError(f"{path}: rank_id must count from 0 through all servers, not {ranks}")
    return servers


def main() -> int:
    path = Path(sys.argv[1])
    try:
        servers = read_servers(path)
        node = os.environ.get("NODE_RANK", "" if len(servers) > 1 else "0")
        if not node.isdigit() or int(node) >= len(servers):
            raise TableError(
                f"NODE_RANK: set it to the number of this node in server_list of {path}, 0 to {len(servers) - 1}"
            )
    except TableError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    address = os.environ.get("MASTER_ADDR") or servers[0]["server_id"]
    print(len(servers), node, address, *servers[int(node)]["ids"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

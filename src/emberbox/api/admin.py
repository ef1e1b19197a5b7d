"""The administrator's operations: nodes, and teams from outside. All need `X-Admin-Token`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Depends, Path, Query
from pydantic import BaseModel

from emberbox.api.account_models import CreatedApiKey, Named, created_api_key
from emberbox.api.auth import Control, admin
from emberbox.api.errors import declared
from emberbox.api.fields import at
from emberbox.api.router import Router
from emberbox.control.fleet import NodeView

router = Router(tags=["admin"], dependencies=[Depends(admin)])

CLUSTER_ID = "00000000-0000-0000-0000-000000000000"
"""An installation is one cluster."""

NodeStatus = Literal["ready", "draining", "connecting", "unhealthy", "standby"]
TeamID = Annotated[UUID, Path(description="Team ID")]
NodeID = Annotated[str, Path(max_length=128, description="Identifier of the node")]
ClusterID = Annotated[UUID | None, Query(description="Identifier of the cluster")]


class DiskMetrics(BaseModel):
    mountPoint: str
    device: str
    filesystemType: str
    usedBytes: int
    totalBytes: int


class NodeMetrics(BaseModel):
    allocatedCPU: int
    allocatedMemoryBytes: int
    cpuPercent: int
    cpuCount: int
    memoryUsedBytes: int
    memoryTotalBytes: int
    disks: list[DiskMetrics]
    hugePagesTotal: int
    hugePagesUsed: int
    hugePagesReserved: int
    hugePageSizeBytes: int


class MachineInfo(BaseModel):
    cpuFamily: str
    cpuModel: str
    cpuModelName: str
    cpuArchitecture: str


class NodeDetail(BaseModel):
    id: str
    serviceInstanceID: str
    clusterID: str
    status: NodeStatus
    statusChangedAt: datetime
    sandboxCount: int
    metrics: NodeMetrics
    createSuccesses: int
    createFails: int
    version: str
    commit: str
    machineInfo: MachineInfo


class Node(NodeDetail):
    sandboxStartingCount: int


class NodeStatusChange(BaseModel):
    status: NodeStatus
    clusterID: UUID | None = None


class KillResult(BaseModel):
    killedCount: int
    failedCount: int


class CancelResult(BaseModel):
    cancelledCount: int
    failedCount: int


@router.get("/nodes", responses=declared(400, 401, 500))
async def list_nodes(plane: Control, clusterID: ClusterID = None) -> list[Node]:
    """Every node that has ever connected."""
    if clusterID is not None and str(clusterID) != CLUSTER_ID:
        return []
    return [
        Node(**_detail(view).model_dump(), sandboxStartingCount=view.description.machines_starting)
        for view in await plane.fleet.nodes()
    ]


@router.get("/nodes/{nodeID}", responses=declared(400, 401, 404, 500))
async def get_node(nodeID: NodeID, plane: Control, clusterID: ClusterID = None) -> NodeDetail:
    return _detail(await plane.fleet.node(nodeID))


@router.post("/nodes/{nodeID}", status_code=204, responses=declared(400, 401, 404, 409, 500))
async def change_node(nodeID: NodeID, body: NodeStatusChange, plane: Control) -> None:
    """Let a node take new sandboxes, or not."""
    await plane.fleet.set_status(nodeID, body.status)


@router.post("/admin/teams/{teamID}/sandboxes/kill", responses=declared(400, 401, 404, 500))
async def kill_sandboxes(teamID: TeamID, plane: Control) -> KillResult:
    """End every sandbox of a team."""
    team = await plane.accounts.team(str(teamID))
    killed, failed = await plane.lifecycle.kill_all(team.id)
    return KillResult(killedCount=killed, failedCount=failed)


@router.get("/admin/sandboxes/running-counts", responses=declared(401, 500))
async def running_counts(plane: Control) -> dict[str, int]:
    """Team ID -> running sandboxes; teams without any are left out."""
    return await plane.metrics.running_by_team()


@router.post("/admin/teams/{teamID}/builds/cancel", responses=declared(400, 401, 404, 500))
async def cancel_builds(teamID: TeamID, plane: Control) -> CancelResult:
    """Give up every build of a team that is not finished."""
    team = await plane.accounts.team(str(teamID))
    return CancelResult(cancelledCount=await plane.builds.cancel_all(team.id), failedCount=0)


@router.post("/admin/teams/{teamID}/api-keys", status_code=201, responses=declared(400, 401, 403, 404, 500))
async def create_key(teamID: TeamID, body: Named, plane: Control) -> CreatedApiKey:
    team = await plane.accounts.team(str(teamID))
    return created_api_key(await plane.accounts.add_credential("api_key", team, body.name))


@router.delete("/admin/teams/{teamID}/api-keys/{apiKeyID}", status_code=204, responses=declared(400, 401, 404, 500))
async def delete_key(teamID: TeamID, apiKeyID: Annotated[str, Path(max_length=64)], plane: Control) -> None:
    team = await plane.accounts.team(str(teamID))
    await plane.accounts.delete("api_key", team, apiKeyID)


def _detail(view: NodeView) -> NodeDetail:
    seen = view.description
    return NodeDetail(
        id=view.record.id,
        serviceInstanceID=seen.service_instance_id or view.record.service_instance_id,
        clusterID=CLUSTER_ID,
        status=view.status,
        statusChangedAt=at(view.record.status_changed_at),
        sandboxCount=view.sandboxes,
        metrics=NodeMetrics(
            allocatedCPU=view.allocated_cpus,
            allocatedMemoryBytes=view.allocated_memory_mb * 1024 * 1024,
            cpuPercent=round(seen.cpu_used_percent),
            cpuCount=seen.cpu_count,
            memoryUsedBytes=seen.memory_used_bytes,
            memoryTotalBytes=seen.memory_bytes,
            disks=[
                DiskMetrics(
                    mountPoint="data",
                    device="",
                    filesystemType="",
                    usedBytes=max(0, seen.disk_bytes - seen.disk_free_bytes),
                    totalBytes=seen.disk_bytes,
                )
            ],
            hugePagesTotal=0,
            hugePagesUsed=0,
            hugePagesReserved=0,
            hugePageSizeBytes=0,
        ),
        createSuccesses=seen.creates_succeeded,
        createFails=seen.creates_failed,
        version=seen.version or view.record.version,
        commit="",
        machineInfo=MachineInfo(
            cpuFamily="",
            cpuModel=seen.cpu_model,
            cpuModelName=seen.cpu_model,
            cpuArchitecture=seen.cpu_architecture,
        ),
    )

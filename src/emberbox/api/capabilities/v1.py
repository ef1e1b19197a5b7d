"""The published REST adapter of the `sandboxes` capability: the same operations under `/v1`, answers unchanged."""

from __future__ import annotations

from emberbox.api import sandboxes
from emberbox.api.errors import declared
from emberbox.api.router import Router

router = Router(prefix="/v1", tags=["capabilities"])

router.add_api_route(
    "/sandboxes",
    sandboxes.list_running,
    methods=["GET"],
    operation_id="v1_list_sandboxes",
    responses=declared(400, 401, 500),
)
router.add_api_route(
    "/sandboxes",
    sandboxes.create,
    methods=["POST"],
    status_code=201,
    operation_id="v1_create_sandbox",
    responses=declared(400, 401, 403, 404, 500, 503, 504),
)
router.add_api_route(
    "/sandboxes/{sandboxID}",
    sandboxes.get,
    methods=["GET"],
    operation_id="v1_get_sandbox",
    responses=declared(401, 404, 500),
)
router.add_api_route(
    "/sandboxes/{sandboxID}",
    sandboxes.kill,
    methods=["DELETE"],
    status_code=204,
    operation_id="v1_kill_sandbox",
    responses=declared(401, 404, 500, 503),
)

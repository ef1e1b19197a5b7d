"""How patient the Emberboxes and nodes are that tests start."""

TIME_SCALE = 3.0
"""Their `EMBERBOX_TIME_SCALE`: tests run two at a time, on machines that may stand still for seconds."""

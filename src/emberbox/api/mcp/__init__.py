"""The Sandbox API as an MCP server at `/mcp`. Only `api.app` calls in here.

`server` is the endpoint: it checks the caller and loads the rest at the first request. `protocol` speaks MCP through
the official library, `tools` and `work` are what agents may call, `resources` what they may read.
"""

from __future__ import annotations

import uvicorn

if __name__ == "__main__":
    uvicorn.run("interpreter.app:app", host="0.0.0.0", port=49999, log_level="warning", timeout_keep_alive=75)

# Shells use the Python of the kernel: what `pip install` adds there, code can import.
export PATH="/opt/interpreter/venv/bin:$PATH"

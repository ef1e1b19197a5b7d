"""The Firecracker runtime: every sandbox is a microVM with a kernel of its own.

Used by `emberbox.node` through the protocol in `emberbox.runtime.base`, and by `emberbox setup`
for the guest files. Nothing else imports this package.
"""

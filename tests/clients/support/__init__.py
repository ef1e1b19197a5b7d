"""What the client tests share: an Emberbox to talk to, time that scales, and small waits."""

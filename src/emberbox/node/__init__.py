"""One host's machines: slots, disks, deadlines, metrics, adoption. Spoken to over gRPC only."""

"""Published checkpoints in a bucket or folder: names, versions, tags, listing and sharing."""

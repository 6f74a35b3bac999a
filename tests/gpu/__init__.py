"""The GPU tier: `make gpu` runs it. See `common` for what its tests share, `schedule` for the order they run in."""

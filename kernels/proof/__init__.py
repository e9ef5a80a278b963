"""What proves the operations: contract, registry, closeness, check, bench, compile. Training never loads it."""

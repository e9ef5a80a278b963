"""One file per operation: its sizes, inputs, mutants, unavoidable work, compile specs, in one record `OP`."""

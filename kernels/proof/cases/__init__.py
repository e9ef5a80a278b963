"""One file per operation: its sizes, inputs, mutants, unavoidable work, in one record `OP`."""

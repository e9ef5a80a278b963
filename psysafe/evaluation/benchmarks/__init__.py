"""One benchmark a file; psysafe/evaluation/benchmark.py says what each has to define."""

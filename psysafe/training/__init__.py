"""What train.py is made of, and what it plans before its first step."""

"""A backbone and a task as somebody outside the project would write them."""

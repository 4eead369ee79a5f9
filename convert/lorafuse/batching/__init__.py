"""`lorafuse batch`: many adapters, each into a result of its own, with few passes over the base."""

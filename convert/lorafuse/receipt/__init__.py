"""`lorafuse_receipt.json`: written at the end of a merge, read by everything that looks at a result."""

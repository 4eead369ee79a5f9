"""Passes over the base, each of which makes one result or several; and `lorafuse batch`, which puts them together."""

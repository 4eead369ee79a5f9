"""Passes over the base, each of which makes one result or several; `lorafuse batch` puts them together."""

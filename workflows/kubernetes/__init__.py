"""Runs on Kubernetes: the API, the RayJob that is made from the template, and following it."""

"""The cluster: the Model resource, its controller and what talks to Kubernetes, so that nothing else has to."""

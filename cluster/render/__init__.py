"""Renders files that start a run's machines elsewhere: manifests for KubeRay (`kuberay`) and a file for `ray up` on AWS (`aws`)."""

"""The cluster's front door: choosing an afslet, forwarding to it, and the cluster's status."""

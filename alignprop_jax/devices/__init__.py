"""The devices: mesh, hosts, cores of a CPU, compiled programs."""

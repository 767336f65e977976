//! What every process domain links: hypercalls, grants, ports, rings, journal, store client

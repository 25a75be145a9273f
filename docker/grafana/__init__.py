"""What Grafana is given: datasource, boards, and the code that writes them."""

"""What `benchmarks gpu` measures: networks, engines, stages. NOT RUN ON HARDWARE."""

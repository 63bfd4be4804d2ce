"""Plans what a run costs (`plan`, `calibration`), submits it to a cluster (`submit`, `follow`), and renders machines (`machines`)."""

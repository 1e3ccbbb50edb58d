"""Step times of engines, measured or published, one file each."""

package host

import "testing"

func TestCollapseCounts(t *testing.T) {
	r, err := Collapse()
	if err != nil {
		t.Fatal(err)
	}
	if r.Regions == 0 || r.Chunks != r.Collapsed+r.AlreadyHuge+r.Skipped {
		t.Errorf("%+v", r)
	}
}

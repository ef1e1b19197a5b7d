package host

import (
	"os"
	"testing"
)

func TestCollapseCounts(t *testing.T) {
	r, err := Collapse()
	if err != nil {
		t.Fatal(err)
	}
	if r.Regions == 0 || r.Chunks != r.Collapsed+r.AlreadyHuge+r.Skipped {
		t.Errorf("%+v", r)
	}
}

func TestRelaxMonitorChangesOneThread(t *testing.T) {
	RelaxMonitor()

	late := 0
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if slack, err := os.ReadFile("/proc/" + entry.Name() + "/timerslack_ns"); err == nil && string(slack) == "4000000\n" {
			late++
		}
	}
	if late != 1 {
		t.Errorf("%d threads of %d have late timers", late, len(entries))
	}
}

func TestWriteIfChangedLeavesNothingOfTheOldContent(t *testing.T) {
	path := t.TempDir() + "/name"
	for _, content := range []string{"first\n", "other\n", "longer than before\n", "short\n", "", "again\n"} {
		if err := writeIfChanged(path, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("wrote %q, found %q, %v", content, got, err)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", info, err)
	}
}

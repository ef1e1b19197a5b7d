package boot

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// maxLayers is below what the guest has interrupts for (see the design's page on disks).
const maxLayers = 24

type options struct {
	layers      int
	hostname    string
	address     netip.Prefix // invalid: no network
	gateway     netip.Addr   // invalid: no default route
	dns         []netip.Addr
	controlHash string
}

// parse splits a kernel command line. Quoting is the kernel's: a value with
// spaces stands in double quotes. The last of equal keys counts.
func parse(line string) map[string]string {
	words := map[string]string{}
	quoted := false
	for word := range strings.FieldsFuncSeq(strings.TrimRight(line, "\n\x00"), func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && (r == ' ' || r == '\t' || r == '\n')
	}) {
		key, value, _ := strings.Cut(strings.ReplaceAll(word, `"`, ""), "=")
		words[key] = value
	}
	return words
}

func optionsOf(words map[string]string) (options, error) {
	o := options{hostname: words["emberd.hostname"], controlHash: words["emberd.control_hash"]}
	var err error
	if o.layers, err = strconv.Atoi(words["emberd.layers"]); err != nil || o.layers < 1 || o.layers > maxLayers {
		return o, fmt.Errorf("emberd.layers must be 1 to %d, got %q", maxLayers, words["emberd.layers"])
	}
	if text := words["emberd.address"]; text != "" {
		if o.address, err = netip.ParsePrefix(text); err != nil || !o.address.Addr().Is4() {
			return o, fmt.Errorf("emberd.address must be an IPv4 address with its prefix length, got %q", text)
		}
	}
	if text := words["emberd.gateway"]; text != "" {
		if o.gateway, err = netip.ParseAddr(text); err != nil || !o.gateway.Is4() {
			return o, fmt.Errorf("emberd.gateway must be an IPv4 address, got %q", text)
		}
		if !o.address.IsValid() {
			return o, errors.New("emberd.gateway needs emberd.address")
		}
	}
	for text := range strings.SplitSeq(words["emberd.dns"], ",") {
		if text == "" {
			continue
		}
		server, err := netip.ParseAddr(text)
		if err != nil {
			return o, fmt.Errorf("emberd.dns must be addresses separated by commas, got %q", words["emberd.dns"])
		}
		o.dns = append(o.dns, server)
	}
	return o, nil
}

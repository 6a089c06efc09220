// What the device reports to Python (events.py): waits of the host, copies that nobody waits for, and faults.
#pragma once
#include <string>

namespace simulated {

using Listener = void (*)(const char* kind, const char* event, long long bytes);
inline Listener listener = nullptr;

inline void report(const char* kind, const std::string& event, long long bytes = 0) {
  if (listener) listener(kind, event.c_str(), bytes);
}
inline void report_wait(const std::string& event, long long bytes = 0) { report("wait", event, bytes); }
inline void report_copy(const std::string& event, long long bytes = 0) { report("copy", event, bytes); }
inline void report_fault(const std::string& event) { report("fault", event); }

}  // namespace simulated

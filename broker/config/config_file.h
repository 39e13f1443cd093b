// ReadConfigFile: the settings of a YAML file.
//
//   capacity: 80%
//   policy:
//     reclaim_patience: 500ms
//
// InvalidArgument names file, line, key, value and what is allowed; an unknown
// key is an error that names the nearest known one, a key given twice too.
#ifndef KVBROKER_BROKER_CONFIG_CONFIG_FILE_H_
#define KVBROKER_BROKER_CONFIG_CONFIG_FILE_H_

#include <string>

#include "absl/status/status.h"
#include "broker/config/broker_config.h"

namespace kvbroker {

// Over what `config` says already. NotFound, PermissionDenied: as the system
// says when it opens the file.
absl::Status ReadConfigFile(const std::string& path, BrokerConfig& config);

// The same of a text; `name` stands for the file in errors.
absl::Status ReadConfigText(const std::string& text, const std::string& name,
                            BrokerConfig& config);

}  // namespace kvbroker

#endif  // KVBROKER_BROKER_CONFIG_CONFIG_FILE_H_
